"""Solver in the loop (Um et al. 2020; DeepZero, Appendix H): a network corrects a coarse solver at every step."""
