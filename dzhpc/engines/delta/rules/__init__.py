"""Rules: how a change travels through each kind of operation. :mod:`dzhpc.engines.delta.rules.table` lists them."""
