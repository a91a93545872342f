"""From the names of attacks and defenses to measured results: variants, suspects, third-party models, published numbers."""
