"""next_text: reinforcement learning on plain text; the policy reasons, then writes what the text says next."""
