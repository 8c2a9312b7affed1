"""What makes something of a disk: copies, files, smaller images, new disks, a guest that holds still."""
