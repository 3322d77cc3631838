"""Tasks that are conversations: messages in, messages out, over the token protocol of ``environments/base.py``."""
