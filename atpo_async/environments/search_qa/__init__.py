"""Questions that are answered through a search engine, as AT2PO and Search-R1 train on them."""
