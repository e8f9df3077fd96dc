"""Example data sets: digits, Fashion-MNIST, and stories with its pictures."""
