// Which access happens before which: vector clocks of threads, carried by barriers, fences, acquires and releases.
#pragma once
#include <memory>
#include <unordered_map>
#include <vector>
#include "numbers.h"

typedef std::vector<u32> Clock;  // by thread of one CTA
typedef std::shared_ptr<Clock> ClockPtr;
struct Known {  // what a thread knows of others: by CTA
  std::unordered_map<int, ClockPtr> clocks;
  bool has(int cta, int thread, u32 clock) const {
    auto found = clocks.find(cta);
    return found != clocks.end() && (*found->second)[thread] >= clock;
  }
};
typedef std::shared_ptr<Known> KnownPtr;  // shared by threads, never changed once it is

static inline ClockPtr join(const ClockPtr& a, const ClockPtr& b) {
  bool nothing_new = true;
  for (size_t i = 0; i < b->size(); i++) nothing_new &= (*b)[i] <= (*a)[i];
  if (a == b || nothing_new) return a;
  auto both = std::make_shared<Clock>(*a);
  for (size_t i = 0; i < b->size(); i++) (*both)[i] = std::max((*a)[i], (*b)[i]);
  return both;
}
static inline KnownPtr join(const KnownPtr& a, const KnownPtr& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto both = std::make_shared<Known>(*a);
  for (auto& entry : b->clocks) {
    ClockPtr& mine = both->clocks[entry.first];
    mine = mine ? join(mine, entry.second) : entry.second;
  }
  return both;
}

// The last accesses of a cell of memory. The cell is as large as the smallest access, so that none is shared falsely.
struct Access {
  u32 thread = 0, clock = 0, pc = 0;  // thread: of the whole grid, from 1; 0: none
  bool strong = false;                // atomic, or ld/st with an order of their own
  bool whole_warp = false;            // a wgmma's, recorded under the warp's first lane
  bool together = false;              // the warp was undivided
};
struct Cell {
  Access write, atomics[2], reads[3];
};

struct Synchronisation {  // what releases left at an address
  KnownPtr everywhere, in_cta;
  int cta = -1;                 // whose in_cta is
  bool to_system = false;       // released at system scope, last by:
  int pc = 0, by_cta = 0, by_thread = 0;
};
