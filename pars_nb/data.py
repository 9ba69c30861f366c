"""Gone in 0.2: its names have moved (`pars_nb.moved`)."""
from pars_nb.moved import forwards

__getattr__ = forwards("data")
