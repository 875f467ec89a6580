"""Engine ``delta``: the change that each coordinate causes travels through the network."""
