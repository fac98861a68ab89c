"""The methods that adapt a model to a domain, and the engine that trains them."""
