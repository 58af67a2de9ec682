// Where an op gets the memory that it works in: from its caller, who knows how long a call's memory has to live.
#pragma once
#include <cstdint>

namespace diffqkv {

class Memory {
 public:
  // So many bytes of any content, until the op is done. Aligned to 256 bytes on a GPU; on the CPU anyhow. An op asks at
  // most once a call.
  virtual void* take(int64_t bytes) = 0;

 protected:
  ~Memory() = default;
};

}  // namespace diffqkv
