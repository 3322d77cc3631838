"""Groups of trees with roles: proposers, and synthesizers that read what they said."""
