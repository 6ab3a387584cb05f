"""What growing and training take, on paper."""
