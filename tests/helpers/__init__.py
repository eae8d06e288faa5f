"""What several test files share: nets, batches, runs, plugins, stand-ins for hardware."""
