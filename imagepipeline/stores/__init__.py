"""Where things live, one technology a file: Redis lists, a disk, a SQL database, LanceDB."""
