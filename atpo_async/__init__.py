"""What the roles share: vocabulary, wire, configuration, run directory, command line."""

__version__ = "0.1.0"
