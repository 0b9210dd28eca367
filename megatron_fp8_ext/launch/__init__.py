"""From a preset to a command: plan (pure), check, render for a launcher, start."""
