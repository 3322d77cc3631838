"""What the whole batch decides before its first optimizer step: statistics over its tokens, and chance by token."""
