"""What frameworks need that call ``optimizer.step()`` themselves; see docs/use_with.md.

Each file imports its framework, so none is imported from here.
"""
