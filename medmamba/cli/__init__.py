"""What a user types: parse, call one verb of ``medmamba.pipeline``, print."""
