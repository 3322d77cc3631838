"""The front of a buffer of several shards (``buffer.shards = n``): one address for actors and learner, no state of its
own that matters.

*Who holds what.*  A shard is a whole buffer: its journal (``journal/shard-k-of-n``), its leases, its trees, its part of
every batch.  It owns the tasks ``index mod n`` and their trees, whose ids begin with its name
(``core.naming.shards``), so that every durable decision is one shard's and is in one commit.  The front (the role
``buffer``) keeps nothing on disk: all that it knows it has from the shards (``buffer-0`` to ``buffer-n-1``, processes
that it starts itself), and asks them again when it starts.

*Turns.*  An answer with leases has the addresses of the shards.  An actor that reaches them sends a tree's messages
straight to its shard, which acknowledges them after its commit; so ingest grows with the shards.  An actor that does
not sends them to the front, which passes the frames on by the tree's id without reading the turn, and acknowledges them
once the shard has.  Reports, leases and everything of the learner go through the front.

*Leases.*  A shard decides about its own tasks, but admission counts the trees of all shards: every question has what
the other shards have, as last heard, plus what is being asked of them (``leases.admission.Elsewhere``).  The front can
only overestimate that sum: leases under way are added before a shard decides, and trees leave it by the learner's hand,
through the front.  So no bound of one buffer is exceeded.  Tasks begin in their order as far as the shards' answers
allow.

*Batches.*  A batch is a draw from the trees of all shards as if they lay in one pool, one shard's after the other's.
The front asks every shard for what it has (number, priority, age of each ready tree; admission bounds their number by
``staleness.max_trees_pending``), and draws with the sampler of the run: the same code on the same numbers as in one
buffer (``front.draw``), so P_i, w_PER and the law of the draw are those of one pool, whatever the sampler.  With the
built-in one a stratum's target falls into a shard by the shard's mass, and into a tree of it by the tree's.  Trees that
must go before they are too old are chosen among those of all shards.  Then every shard commits its part, an empty one
too, under one number.

*A batch is one.*  It exists once every shard has its part, and nothing of it is sent before that.  After a restart of
the front or of a shard, the front asks all shards for their parts of a step first: if all have the same number, that is
the batch; if only some have one, it was never sent, they take it back, and it is drawn again.  ``Trained``,
``Checkpointed``, publications and evaluations go to every shard, and are acknowledged to the learner when all have
acknowledged them.

*Not with shards*: ``staleness.exact_lag``, which decides on every tree of a batch by the order in which all trees of
the run come; the configuration refuses it.  The number of shards stays what it was at a run's beginning: it decides in
which journal a task is.
"""
