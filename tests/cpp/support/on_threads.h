// A thread pool for the kernels under test: a new thread for each worker.
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

inline void on_threads(int64_t workers, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t w = 0; w < workers; ++w) threads.emplace_back([=] { body(context, w); });
  for (auto& thread : threads) thread.join();
}
