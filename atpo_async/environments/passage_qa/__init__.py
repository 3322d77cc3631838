"""passage_qa: multi-hop questions over a corpus of passages, answered by a chat policy with a search tool."""
