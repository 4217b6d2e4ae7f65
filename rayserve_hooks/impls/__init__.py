"""Callbacks that ship with the package, loaded like anybody else's."""
