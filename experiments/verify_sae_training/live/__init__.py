"""The concepts page with the live model behind it: a server on 127.0.0.1, and what its panel asks of the model."""
