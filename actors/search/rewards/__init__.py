"""What an actor itself pays the turns that it grows."""
