"""What happens around training and testing, each a Lightning callback."""
