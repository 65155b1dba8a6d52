"""Average velocities and their few-step objectives, distribution matching, rectification."""
