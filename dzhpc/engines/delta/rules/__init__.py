"""Rules: how a change travels through each kind of operation. :mod:`table` lists them."""
