"""The stages of device_check."""
