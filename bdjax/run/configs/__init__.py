"""The configurations of the workflows, one file for each: what the flags of a command set.

They stand apart from the workflows, which import the whole library: --help and a mistyped flag are answered without it.
"""
