"""Rewards: functions of a user that judge a conversation, or one turn of it."""
