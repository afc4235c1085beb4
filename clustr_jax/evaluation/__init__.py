"""The paper's protocol, the sound ones, the checks of both, and certificates."""
