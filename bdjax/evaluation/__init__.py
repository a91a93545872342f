"""From an attack and a defense by name to what was measured: variants, suspects, third-party models, papers' rows."""
