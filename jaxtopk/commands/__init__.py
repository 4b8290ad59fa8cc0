"""The subcommands of `jaxtopk`: one module each, holding a dataclass of its flags with a `run` method."""
