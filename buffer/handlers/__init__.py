"""Handlers of the messages from actors and learner: what each request waits for, and when it is answered."""
