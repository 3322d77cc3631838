"""Built-in samplers of ``buffer.sampling``: a module here is one, by its name; ``make`` makes it."""
