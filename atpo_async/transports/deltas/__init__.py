"""Lossless differences between two versions of the weights: made from both, and put on the older one to get the newer.

``blocks`` cuts a payload into blocks, ``codec`` turns one block into its difference and back, ``encoding`` and
``decoding`` do so for whole versions in threads, ``chains`` finds the differences that lead from one version to
another, and ``rebuilding`` is the actor's use of all that.  The learner's is ``learner.weights.differences``.
"""
