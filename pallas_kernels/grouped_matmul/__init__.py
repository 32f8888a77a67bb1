"""grouped matmul"""
