// Files that arrays are mapped from: to read past the end of one that was cut short is a bus error.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

namespace gcfast {

// A shard's file was taken away or cut short while it is mapped.
struct DamagedShard : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A file that a shard's arrays are mapped from, as it was when the table was made.
struct MappedFile {
  std::string path;
  std::uint64_t device;
  std::uint64_t inode;
  std::int64_t bytes;  // from its start to the end of the last array in it
};

// Whether files are as they were, by the rule and in the words of gcfast/database/mapped.py: a file that was
// replaced, alone or with the whole database, is no damage, since what is mapped lives on. Manifests
// that had to be read are kept for the next file, so one object is for one use.
class FileCheck {
 public:
  // Throws DamagedShard where the file was deleted or cut short.
  void operator()(const MappedFile& file);

 private:
  bool replaced(const std::string& path);

  std::map<std::string, std::string> manifests_;  // by folder
};

}  // namespace gcfast
