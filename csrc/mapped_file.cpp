#include "mapped_file.hpp"

#include <sys/stat.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <iterator>
#include <thread>

namespace gcfast {
namespace {

constexpr char kManifest[] = "/manifest.json";
// What takes an old database's place renames that one away first, where the system cannot exchange
// the two.
constexpr int kMovingTries = 20;
constexpr std::chrono::milliseconds kMovingTime{10};

// The manifest of a folder; empty where there is none.
std::string manifest_of(const std::string& folder) {
  for (int attempt = 0; attempt < kMovingTries; ++attempt) {
    if (attempt != 0) std::this_thread::sleep_for(kMovingTime);
    std::ifstream file(folder + kManifest, std::ios::binary);
    if (file)
      return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }
  return {};
}

}  // namespace

void FileCheck::operator()(const MappedFile& file) {
  struct stat now {};
  if (stat(file.path.c_str(), &now) != 0) {
    const int error = errno;
    if (error != ENOENT && error != ENOTDIR)
      throw DamagedShard("the shard " + file.path +
                         " cannot be looked at any more: " + std::strerror(error));
    if (!replaced(file.path))
      throw DamagedShard("the shard " + file.path +
                         " was deleted or moved away while the database was open");
    return;
  }
  const bool same = static_cast<std::uint64_t>(now.st_dev) == file.device &&
                    static_cast<std::uint64_t>(now.st_ino) == file.inode;
  if (same && static_cast<std::int64_t>(now.st_size) < file.bytes)
    throw DamagedShard("the shard " + file.path +
                       " was truncated while the database was open: " + std::to_string(file.bytes) +
                       " bytes of it are in use, it has " + std::to_string(now.st_size));
}

bool FileCheck::replaced(const std::string& path) {
  const std::string::size_type slash = path.rfind('/');
  if (slash == std::string::npos) return false;
  const std::string folder = path.substr(0, slash);
  const std::string named = '"' + path.substr(slash + 1) + '"';
  std::string& manifest = manifests_[folder];
  // A manifest that names it may be another one by now.
  if (manifest.empty() || manifest.find(named) != std::string::npos) manifest = manifest_of(folder);
  return !manifest.empty() && manifest.find(named) == std::string::npos;
}

}  // namespace gcfast
