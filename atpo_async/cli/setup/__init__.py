"""Commands about this machine and its configuration: nothing is trained."""
