"""Families of networks, a folder each; `registry` names them, `protocol` says what each must have."""
