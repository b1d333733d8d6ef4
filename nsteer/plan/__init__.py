"""From a YAML file to a checked study: reader, schema, check, texts, prompts, layers, positions, formulas."""
