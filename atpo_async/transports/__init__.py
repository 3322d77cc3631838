"""Weight transports: how the bytes of a version get from the learner to an actor.

What passes on the learner's weights port, for all that stands between the two ends and forwards it (a relay):

- ``AnnouncementRequest``: the newest version.  Its answer changes.
- ``ManifestRequest(version, base)``: ``base`` is the version that the asker has the bytes of, -1 for none.  With a base
  the answer names the differences that lead to the version, and is held back for seconds while one is being made;
  with ``differences_pending`` it is not final, and is asked for again.  Ask with the asker's own base.  The learner
  makes differences as long as requests with a base, or for chunks, come at all.  A manifest that is not pending stays
  true for all that have the same base; it may name differences that are dropped later.
- ``ChunkRequest(version, base, index)``: a part of the whole payload with ``base`` -1, else of the difference from
  ``base`` to ``version``.  A ``Chunk`` depends on these three numbers alone and never changes, so that it can be kept
  and given to others.  Chunks have the manifest's ``chunk_bytes``, of a difference as of the whole.
- ``VersionGone`` and ``Refused`` say what is so now.  A difference that is refused costs the asker that difference: it
  asks for the whole payload.

What goes wrong between the ends is found: a difference has a digest in the manifest, what it leads to has those of the
version, and the announcement binds them.  Whatever passes on the announcement too, as a relay does, is trusted with it.
"""
