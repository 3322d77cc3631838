"""Names that say where something belongs."""
