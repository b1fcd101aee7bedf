"""How bundles are described, read and written; ``medmamba.bundle`` is the face of it."""
