"""The built-in samplers of ``buffer.sampling``, one module each, of that name; ``make`` makes it."""
