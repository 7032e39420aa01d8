"""The checks of the conformance kit ``distily.testing``, by kind of component."""
