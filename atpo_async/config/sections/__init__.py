"""The sections of a configuration: their fields with types, bounds, defaults and what each means."""
