"""bdjax: backdoor attacks and defenses on image classifiers, in JAX.

The parts, in the order that data passes through them: `datasets`, `triggers`, `models`, `training`, `attacks`,
`defenses`, `inspection`, `reporting`. Each imports only from the ones before it.
"""

__version__ = "0.1.0"
