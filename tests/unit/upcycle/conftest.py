from dense_dir import dense_dir

__all__ = ["dense_dir"]
