"""What a run takes of each GPU's memory, estimated from its configuration and the model's shape before anything starts.

``shape`` says what a model is, ``learner`` and ``engine`` what one role takes, ``cards`` adds up who is on which GPU,
and ``advice`` tries the settings that would save most.  1 GB is 2**30 bytes, as the makers of the cards count.
"""
